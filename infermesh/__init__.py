"""infermesh: the client, the wire contract, and the kit that every service is built with."""
