"""Hugging Face folders of whole models: read, packed, written."""
