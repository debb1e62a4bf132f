"""The stages that turn a traced graph into one whose linears run S-STE: expand, find, decide, rewrite, verify."""
