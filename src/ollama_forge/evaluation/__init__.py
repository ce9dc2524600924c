"""What an edit did: refusals, first-token KL divergence, intervals, controls, verification; and the report of them."""
