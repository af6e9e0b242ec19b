"""Classifiers that can be cut into a client part and a server part."""
