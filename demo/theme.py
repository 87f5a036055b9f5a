"""How the page looks: system fonts (nothing is fetched), one accent, light, dark and narrow."""

from __future__ import annotations

import gradio as gr

CSS = """
:root, .gradio-container {
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --font-mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --for: 13, 148, 136; --against: 217, 119, 6;
}
.gradio-container { max-width: 1080px !important; width: 100% !important;
  margin: 0 auto !important; }
.gradio-container main { width: 100%; }
.gradio-container [role="tab"].selected { color: #0f766e; } /* 5.5 : 1 on white */
.dark .gradio-container [role="tab"].selected, .dark [role="tab"].selected { color: #5eead4; }
#many-table *, #classify-answer * { font-family: var(--font) !important; }
.gradio-container .prose h1 { margin: 0.2rem 0 0.1rem; font-size: 1.6rem; }
.dark { color-scheme: dark; } /* scroll bars and pickers that the browser draws */
.lead p { color: var(--body-text-color-subdued); margin: 0; max-width: 46rem; }
.problem { border-left: 3px solid #dc2626; padding: 0.1rem 0.7rem; }
.problem p { color: #b91c1c; margin: 0.2rem 0; } .dark .problem p { color: #fca5a5; }
.facts { display: flex; flex-wrap: wrap; gap: 0.4rem 1.6rem; line-height: 1.3; }
.facts div { min-width: 7rem; } .facts b { font-size: 1.15rem; display: block; }
.facts span, .quiet { color: var(--body-text-color-subdued); font-size: 0.85rem; }
.words { margin: 0.8rem 0; line-height: 2.1; font-size: 1.05rem; overflow-wrap: anywhere; }
.words span { border-radius: 4px; padding: 0.15em 0.1em; }
.for { background: rgba(var(--for), var(--a, 0.5)); }
.against { background: rgba(var(--against), var(--a, 0.5)); }
.key span { border-radius: 4px; padding: 0.1em 0.5em; margin-right: 0.6em; }
.scroll { overflow-x: auto; }
table.grid { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
table.grid th, table.grid td { text-align: left; padding: 0.45rem 0.6rem !important;
  vertical-align: top; min-width: 5.5rem; border: 0 !important;
  border-bottom: 1px solid rgba(128, 140, 160, 0.35) !important; }
table.grid.even { table-layout: fixed; }
table.grid caption { text-align: left; font-weight: 600; padding: 0.4rem 0.6rem; }
table.grid td { overflow-wrap: anywhere; }
table.grid, table.grid thead, table.grid tbody, table.grid tr { border: 0 !important; }
table.grid small { color: var(--body-text-color-subdued); display: block; font-weight: 400; }
table.grid td.changed { background: rgba(var(--against), 0.22); }
.bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); margin: 4px 0; }
.bar i { display: block; height: 6px; border-radius: 3px; background: rgb(var(--for)); }
@media (max-width: 640px) {
  .gradio-container { padding: 0.4rem !important; }
  .gradio-container .prose h1 { font-size: 1.3rem; }
  /* A table wider than a telephone becomes one block a row, each cell under its column's name. */
  table.grid thead { display: none; }
  table.grid caption { display: block; }
  table.grid tr { display: block; margin-bottom: 0.8rem; }
  table.grid th, table.grid td { display: block; }
  table.grid td[data-name]::before { content: attr(data-name); display: block; font-size: 0.8rem;
    color: var(--body-text-color-subdued); }
}
"""


def theme() -> gr.themes.Base:
    """The page's theme."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=["sans-serif"],  # CSS above names the system's own; a quoted system-ui finds none
        font_mono=["monospace"],
    ).set(
        block_title_text_weight="600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )
