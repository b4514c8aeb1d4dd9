"""How is an organism made?"""
