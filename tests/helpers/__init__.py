"""What the tests share: paths, commands, small models and data."""
