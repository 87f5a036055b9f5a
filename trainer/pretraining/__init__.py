"""Pre-training of the compact T5 `mini`: `python -m trainer backbone`."""
