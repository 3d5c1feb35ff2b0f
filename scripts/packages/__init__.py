"""Ways to install Modelpack besides pip: a zipapp, a Debian package and a Homebrew formula."""
