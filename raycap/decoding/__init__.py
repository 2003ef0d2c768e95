"""The search for a caption, by any model that fits protocol.py. Attention and caches belong to the models."""
