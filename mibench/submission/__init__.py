"""Defenses and attacks from outside: their form, their scores, and three levels of trust."""
