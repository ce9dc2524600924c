"""Map pieces of work over machines. Nothing else imports Ray, and nothing here knows what the work is."""
