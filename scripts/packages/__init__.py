"""Ways to install Modelpack besides pip: a zipapp, a Debian package, a binary, a formula."""
