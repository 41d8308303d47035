"""transfuse."""
