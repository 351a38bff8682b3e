"""One model in several processes of this host, a rank each: started, told each step, watched, and ended together."""
