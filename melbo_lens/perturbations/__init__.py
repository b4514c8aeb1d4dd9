"""What was learned?  Immutable values that know no model."""
