"""An HTTP server for models: requests of several clients share batches; OpenAI's, the web UI's and the hub's clients
can call it.

worker.py     the thread that owns the device, and batches of network calls
serving.py    a pipeline whose networks run there
jobs.py       queue, turns, cancelling
models.py     models by name, loaded when asked for
*_api.py      one dialect each, upon service.py
guard.py      host, origin, key and size, checked before a request is read
app.py        all of it as one ASGI app
"""
