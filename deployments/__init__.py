"""How belt is deployed: what runs when (prefect.yaml), what the server does by itself, and a whole stack to try it."""
