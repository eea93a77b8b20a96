"""Calls of functions and reasoning, in requests and in answers. Shared by the routes that answer chats."""
