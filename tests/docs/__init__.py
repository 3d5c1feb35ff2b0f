"""What the documents say: blocks of shell and Python run, links lead somewhere, the site builds."""
