"""The demo model: the text it learns, the script that trains it and the weights it ends in."""
