"""`fastpref preview`: the tokens that a run would train on, and statistics of the data."""
