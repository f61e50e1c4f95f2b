"""Commands for people about what routers decided; `detoserve` lists them. Not here: serving."""
