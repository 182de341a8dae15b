"""How attacks look for their input: directions, updates, the loop, the best iterate."""
