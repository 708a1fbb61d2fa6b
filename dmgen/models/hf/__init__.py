"""The files that use transformers: loading, decoding and scoring, and faster layers."""
