"""Rules mined from training facts: a scorer whose every score is a sum over rules, and the reasons it gives."""
