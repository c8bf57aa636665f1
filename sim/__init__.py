"""What happens then: arrivals, scheduler, KV blocks, adapter slots, the clock, and the numbers that come out."""
