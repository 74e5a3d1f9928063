"""What the tests stand on: real servers, real workers, and a count of effects at their destination."""
