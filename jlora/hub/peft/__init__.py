"""PEFT's adapter folders: read, written, and PEFT's other methods converted."""
