"""Output for people, for cli, eval and Python users alike: tables, a plan, the picture of its stack."""
