"""The leaderboard: a pure function of the records in ``leaderboard/<version>``."""
