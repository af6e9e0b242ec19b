"""What several defenses are made of: layers for maps and tokens, proxy attackers, dependence."""
