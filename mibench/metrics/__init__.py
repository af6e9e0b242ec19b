"""What the attacker recovered, what it cost the client, and how sure we are of both."""
