"""The tabs; each module builds its own and says what other modules need of it."""
