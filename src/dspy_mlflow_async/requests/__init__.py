"""Services for users: programs and requests whose traces have their own session, user, destination and sampling."""
