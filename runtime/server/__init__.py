"""The HTTP server over `runtime.async_engine`: OpenAI's API for chats and completions, metrics, and a page.

`create_app` makes the application, `runtime.server.serve` runs it as a process. Needs what the extra `serve` installs.
"""
