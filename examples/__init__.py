"""Data, no code: synthetic radiographs to try the program with, and to compare bundles on."""
