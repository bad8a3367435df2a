"""What looks at a run and changes nothing of it: each can be taken out, and the trainer trains as before."""
