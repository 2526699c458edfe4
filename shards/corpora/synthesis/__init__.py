"""Speech synthesis for the built-in scenes: a function of each synthesizer, and the names of their voices."""
