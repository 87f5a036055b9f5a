"""Hypothesis strategies for requests that mean harm, and the statuses that may answer them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

ALLOWED = {200, 400, 401, 404, 405, 413, 415, 422, 429, 503, 504}

# Characters of every plane, lone surrogates included (JSON can spell them, UTF-8 cannot).
characters = st.characters()
texts = st.one_of(
    st.text(characters, max_size=60),
    st.sampled_from(["", " ", "\0", "</s>", "<extra_id_0>", "<pad>" * 50, "\u202e", "a" * 20_000,
                     "\U0010ffff" * 300, "e\u0301" * 4000, "\n" * 5000, "good " * 5000]),
)  # fmt: skip
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
tasks = st.one_of(st.sampled_from(["film", "food", "nothing", "../film"]), texts, values)
tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": values,
        "shape": st.one_of(st.lists(st.integers(-2, 5), max_size=3), values),
        "datatype": st.one_of(st.just("BYTES"), values),
        "data": st.one_of(st.lists(texts, max_size=5), values),
    },
)
bodies = st.one_of(
    st.binary(max_size=200),
    st.fixed_dictionaries(
        {},
        optional={
            "text": st.one_of(texts, values),
            "texts": st.one_of(st.lists(texts, max_size=40), values),
            "task": tasks,
            "truncate": st.one_of(st.booleans(), values),
        },
    ),
    st.fixed_dictionaries({"texts": st.lists(texts, max_size=40), "task": st.just("film")}),
    st.fixed_dictionaries(
        {"inputs": st.one_of(st.lists(tensors, max_size=2), values)},
        optional={"id": values, "outputs": values, "parameters": values},
    ),
    values,
)
segments = st.sampled_from(["film", "food", "nothing", "..", "%2e%2e", "a" * 300, "\u00e9"])
paths = st.one_of(
    st.sampled_from(["/classify"] * 6 + ["/v2/models/film/infer", "/v2/models/food/infer"] * 4),
    st.sampled_from(["/", "/v2", "/openapi.json", "/v2/models/film"]),
    st.builds("/v2/models/{}/infer".format, segments),
    st.builds("/v2/models/{}/ready".format, segments),
    st.builds("/v2/repository/models/{}/load".format, segments),
    st.builds("/{}/{}".format, segments, segments),
)
methods = st.sampled_from(["POST"] * 8 + ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
headers = st.dictionaries(
    st.sampled_from(["content-type", "content-encoding", "authorization", "accept", "x-odd"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30),
    max_size=2,
)
