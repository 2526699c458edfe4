"""Pages of HTML in one file each, without scripts and without anything from the network."""
