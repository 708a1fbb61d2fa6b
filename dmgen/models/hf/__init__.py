"""Everything that knows transformers: loading, decoding and scoring, and faster layers."""
