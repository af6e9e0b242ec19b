"""Whether a component does what it says, and whether a result follows from what it rests on."""
