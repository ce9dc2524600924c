"""The OpenAI and Anthropic APIs: what requests mean, and how answers are written. The routes are beside this folder."""
