"""Who may do what: keys, the scope that each route asks for, and how much a caller may use.

`gate.py` puts them before every request. Which objects are a tenant's is asked where objects are
read: this package only says who is asking.
"""
