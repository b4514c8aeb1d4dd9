"""What do we touch?  The only folder that knows TransformerLens, and the only one whose files attach hooks."""
