"""What do we touch?  The model; this is the only folder that knows TransformerLens, and that attaches hooks."""
