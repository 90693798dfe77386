"""Episodes: who acts, in which order, and what came of it. Nothing here knows how a level learns."""
