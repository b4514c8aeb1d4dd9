"""How are many trials run, on one machine or several, so that nothing is done twice?  A plan, a folder, an engine."""
