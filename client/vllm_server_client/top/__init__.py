"""`vllm-server top`: what the machine does, live.  snapshot.py and drawing.py are pure, app.py and screens.py show."""
