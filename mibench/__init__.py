"""mibench: how much of a private image leaks in split inference, and what a defense costs."""

__version__ = "0.1.0"
