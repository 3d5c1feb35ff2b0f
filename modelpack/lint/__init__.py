"""What a catalogue asks of the models in it, and what it finds."""
