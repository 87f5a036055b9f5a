"""A Gradio page on top of `serve`: try prompts, compare them, teach one."""
