"""Many processes: how they meet, what they exchange, and what happens when one is lost."""
