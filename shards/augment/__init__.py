"""Random augmentation of waveforms and pictures: a function of seed and position in the training data alone."""
